#!/bin/sh
# benchmarks/gpu.sh OUTPUT [options of gpu.py]: on a machine with one NVIDIA GPU and builds of torch and jax for it.
#
# Packages that the machine lacks may lie beside this file as wheels, in wheels/ (and TRL's in wheels/trl1.12, wheels/trl1.16):
#     pip download --no-deps -d benchmarks/wheels array-api-compat hydra-core ...
# Lockstep runs from the repository; its entry points are written into a folder of this run's own, so nothing is installed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for peer in trl1.12 trl1.16; do
  if [ -d "$here/wheels/$peer" ]; then
    python3 -m pip install -q --no-index --no-deps --target "$site/peers/$peer" "$here/wheels/$peer"/*.whl
  fi
done
if ls "$here"/wheels/*.whl > /dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --target "$site/packages" "$here"/wheels/*.whl
fi
python3 - "$root" "$site" <<'PYTHON'
import pathlib, sys, tomllib
root, site = map(pathlib.Path, sys.argv[1:])
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
folder = site / "entry_points" / "lockstep_rlhf-0.dist-info"
folder.mkdir(parents=True)
lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()) for group, points in project["entry-points"].items()]
(folder / "entry_points.txt").write_text("\n".join(lines))
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
PYTHON
export PYTHONPATH="$root/framework:$root/plugins:$site/packages:$site/entry_points${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
export XLA_FLAGS="${XLA_FLAGS:---xla_gpu_enable_triton_gemm=false}" # else XLA tries many kernels for each matmul, for minutes
peers=${PEERS:-$site/peers}
python3 "$here/speed/gpu.py" --peers "$peers" "$@"
