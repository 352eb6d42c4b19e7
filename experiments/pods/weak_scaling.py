"""Communication per step against the number of chips, predicted from compiled programs.

    python experiments/pods/weak_scaling.py   # writes weak_scaling.json, .png and README.md's table

The model is the 8B decoder with 8,192 tokens per chip, on 16 to 4,096 H200s, eight per host, with
FSDP over all chips, or FSDP x 4-way tensor parallelism. The bytes sent hardly depend on the kind of
chip, and the GPU compiler takes only seconds.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from check import compile_check, write_between  # noqa: E402

CHIPS = (16, 64, 256, 1024, 4096)
TENSOR = {"fsdp": 1, "fsdp x tensor 4": 4}
RESULTS = HERE / "weak_scaling.json"


def main() -> int:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, tensor in TENSOR.items():
        for chips in CHIPS:
            key = f"{name}/{chips}"
            if key not in results:
                results[key] = compiled(chips, tensor)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[key], flush=True)
    write_between(HERE / "README.md", "weak scaling", table(results))
    plot(results)
    return 0


def compiled(chips: int, tensor: int) -> dict:
    """Bytes that a device sends per step, by kind of collective, and the predicted time and MFU."""
    output = HERE / "weak_scaling.tmp.json"
    done = compile_check(
        "--flagfile=experiments/pods/shapes/llama3_8b.flags", f"--topology=h200:1x{chips // 8}x8",
        f"--mesh.tensor={tensor}", f"--data.batch_size={chips}", "--transformer.remat=attention",
        f"--output={output}",
    )  # fmt: skip
    done.check_returncode()
    report = json.loads(output.read_text())
    output.unlink()
    sent: dict[str, int] = {}
    for c in report["collectives"]:
        sent[c["kind"]] = sent.get(c["kind"], 0) + c["bytes_sent"]
    return {
        "sent": sent,
        "links_seconds": report["predicted"]["bounds_seconds"]["links"],
        "step_seconds": report["predicted"]["step_seconds"],
        "mfu": report["predicted"]["mfu"],
    }


def table(results: dict) -> str:
    rows = [
        "| mesh | chips | sent (GB) | time on links (s) | step (s) | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for key, r in results.items():
        mesh, chips = key.split("/")
        rows.append(
            f"| {mesh} | {int(chips):,} | {sum(r['sent'].values()) / 1e9:.2f} | "
            f"{r['links_seconds']:.3f} | {r['step_seconds']:.3f} | {r['mfu']:.1%} |"
        )
    return "\n".join(rows)


def plot(results: dict):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in TENSOR:
        chips = [c for c in CHIPS if f"{name}/{c}" in results]
        sent = [sum(results[f"{name}/{c}"]["sent"].values()) / 1e9 for c in chips]
        axes.plot(chips, sent, marker="o", label=name)
    axes.set(xscale="log", xlabel="chips (H200)", ylabel="sent per chip and step (GB)")
    axes.set_xticks(list(CHIPS), [f"{c:,}" for c in CHIPS])
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "weak_scaling.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
