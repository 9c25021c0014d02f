"""The content of the site: Markdown pages and the files they show, from anywhere in the repository, and an API reference page for
each module below, from its docstrings."""

from __future__ import annotations

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ["*.md", "LICENSE", "CITATION.cff", "docs/**/*", "benchmarks/**/*"]
SUFFIXES = {".md", ".png", ".svg", ".css", ".yaml", ".ipynb", ".cff", ""}

API = {
    "lockstep": "The Python API.",
    "lockstep.interfaces": "What a plugin implements.",
    "lockstep.registry": "Resolves components by kind, name and backend; how plugins declare them.",
    "lockstep.types": "The nouns: prompts, demonstrations, comparisons.",
    "lockstep.errors": "Errors whose message explains the fix.",
    "lockstep.config.schema": "YAML to checked dataclasses.",
    "lockstep.learning.numerics": "KL, rewards, GAE, whitening, rankings, intervals.",
    "lockstep.learning.rollout": "Prompts to sampled, stopped and scored responses.",
    "lockstep.learning.losses": "Losses over [batch, time], for every backend.",
    "lockstep.learning.randomness": "Every random number as a function of (seed, stream, step, row).",
    "lockstep.learning.optimisation": "Adam and learning-rate schedules.",
    "lockstep_rlhf.algorithms.ppo": "PPO.",
}


def on_config(config):
    for entry in config["nav"]:
        if "API reference" in entry:
            entry["API reference"] = ["api/index.md", *({name: f"api/{name}.md"} for name in API)]
    return config


def on_files(files: Files, config) -> Files:
    """The theme's files, and ours under their paths in the repository."""
    found = {file for pattern in PAGES for file in ROOT.glob(pattern) if file.is_file() and file.suffix in SUFFIXES}
    ours = {file.relative_to(ROOT).as_posix(): {"abs_src_path": str(file)} for file in sorted(found)}
    listing = "".join(f"* [`{name}`]({name}.md): {summary}\n" for name, summary in API.items())
    ours["api/index.md"] = {"content": f"# API reference\n\n{listing}"}
    ours |= {f"api/{name}.md": {"content": f"# `{name}`\n\n::: {name}\n"} for name in API}
    return Files(
        [file for file in files if file.src_dir != config["docs_dir"]]
        + [File.generated(config, path, **source) for path, source in ours.items()]
    )
