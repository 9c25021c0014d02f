"""Print the table of families in docs/models.md."""

from lockstep.models.architecture import FAMILIES

print("| `model_type` | what is special | refused |\n|---|---|---|")
for name, family in FAMILIES.items():
    print(f"| `{name}` | {family.special} | {family.refused} |")
