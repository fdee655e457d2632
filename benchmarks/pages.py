"""The figures in the pages: all of one run of ``make bench``, the newest in ``benchmarks/results``.

    python -m benchmarks.pages [--check]

In a page a figure stands between two comments, which nobody sees: <!--= NAME -->235 ms<!--=-->. This writes them anew;
with ``--check`` (``make check``) it says which of them are not those of the results, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Line, Timing, digits, read_lines, share, summary
from benchmarks.training import experiment_table, modes_table

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# A figure of its own run, which says so beside it: too long for ``make bench``, or about another project.
APART = ("fe20269", "066a691", "067b021", "ff6d4d1", "3602360", "26d6d00", "c07c2d7")
_MARK = re.compile(r"(<!--= (?P<name>[^>]+?) -->)(?P<text>.*?)(<!--=-->)", re.S)


def newest(folder: Path = ROOT / "benchmarks" / "results") -> dict[str, Any]:
    """The figures of the last run."""
    content: dict[str, Any] = json.loads(max(folder.glob("*.json")).read_text(encoding="utf-8"))
    return content


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages may show, by its name."""
    lines = [line for part in results.values() if isinstance(part, dict) and "lines" in part for line in _lines(part)]
    minutes, seconds = divmod(round(results["total_seconds"]), 60)
    found = {
        "run.commit": results["commit"],
        "run.minutes": str(round(results["total_seconds"] / 60)),
        "run.time": f"{minutes} min {seconds:02} s",
        "table.summary": f"\n\n{summary(lines)}\n\n",
        "table.modes": f"\n\n{modes_table(results['training']['modes'])}\n\n",
        "table.experiment": f"\n\n{experiment_table(results['training']['experiment'])}\n\n",
    }
    for prefix, what, peer in _LINES:
        found |= _of_line(prefix, next(line for line in lines if line.what == what and line.peer.startswith(peer)))
    for part in (_packing, _nll, _scoring, _training):
        found |= part(results)
    return found


_LINES = (
    ("pack.numba", "pack 1,000,000 lengths into 2,048", "numba"),
    ("pack.trl", "pack 1,000,000 lengths into 2,048", "TRL"),
    ("pack10m", "pack 10,000,000 lengths into 2,048", "numba"),
    ("nll", "loss per token, bfloat16, T 4096, D 576, V 49152", "cut-cross"),
    ("nll.wide", "loss per token, bfloat16, T 2048, D 2048, V 32000", "cut-cross"),
    ("gradients", "mean loss and gradients, bfloat16, T 2048, D 576, V 49152", "cut-cross"),
    ("attention", "attention_with_gradients, 2,048 tokens in 26 samples, 9 heads, bfloat16", "PyTorch"),
    ("ifd.bfloat16", "IFD of a quarter of 120 rows, SmolLM2-135M, bfloat16", "the paper"),
    ("ifd.float32", "IFD of a quarter of 60 rows, SmolLM2-135M, float32", "the paper"),
    ("kmeans", "k-means, 40,000 x 384, k 10", "faiss"),
    ("generate.batch", "generate, 16 tasks, bfloat16", "model.generate, padded"),
    ("generate.single", "generate, 16 tasks, bfloat16", "model.generate, one"),
)


def _lines(part: Mapping[str, Any]) -> Iterator[Line]:
    """With the words of today: the protocol of the paper was called seed."""
    renamed = [{**line, "peer": line["peer"].replace("seed's", "the paper's")} for line in part["lines"]]
    yield from read_lines({"lines": renamed})


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{digits(1000 * seconds)} ms"


def _of_line(prefix: str, line: Line) -> dict[str, str]:
    ours, theirs = line.ours.median, line.theirs.median
    return {
        f"{prefix}.time": _time(ours),
        f"{prefix}.peer": _time(theirs),
        f"{prefix}.ratio": f"{line.ratio:,.0f}"
        if line.ratio >= 10
        else f"{line.ratio:.{1 if line.ratio >= 1 else 2}f}",
        f"{prefix}.floor": share(line.floor, line.ours).replace("%", " %"),
        f"{prefix}.memory": _mebibytes(line.memory),
        f"{prefix}.peer_memory": _mebibytes(line.peer_memory),
    }


def _mebibytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


def _record(records: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    return next(record for record in records if all(record[name] == value for name, value in values.items()))


def _packing(results: Mapping[str, Any]) -> dict[str, str]:
    best = _record(results["packing"]["records"], items=1_000_000, capacity=2048, what="bfd")
    each = results["packing"]["added_bytes"]["bfd"] / 1e6
    return {"pack.waste": f"{100 * best['waste']:.3f} %", "pack.bytes_a_length": f"{each:.1f}"}


def _nll(results: Mapping[str, Any]) -> dict[str, str]:
    records, peak = results["nll"]["records"], results["nll"]["multiplier_peak"]
    found = {f"peak.{dtype}": f"{flops / 1e9:,.0f} GFLOP/s" for dtype, flops in peak.items()}
    for prefix, shape in (("nll", [4096, 576, 49152]), ("nll.wide", [2048, 2048, 32000])):
        of = {"kind": "nll", "dtype": "bfloat16", "shape": shape}
        ours = _record(records, **of, what="codeact, native avx512bf16")
        plain = _record(records, **of, what="PyTorch, all logits")
        found |= {
            f"{prefix}.plain": _time(Timing(tuple(plain["timing"])).median),
            f"{prefix}.plain_memory": _mebibytes(plain["added_bytes"]),
            f"{prefix}.plain_ratio": f"{ours['times_plain']:.{1 if prefix == 'nll' else 2}f}",
            f"{prefix}.error": f"{ours['error']:.0e}".replace("e-0", "e-"),
            f"{prefix}.plain_error": f"{plain['error']:.1e}".replace("e-0", "e-"),
        }
    wide = _record(records, kind="nll", dtype="float32", shape=[4096, 576, 49152], what="codeact, native avx512")
    return {**found, "nll.float32.error": f"{wide['error']:.0e}".replace("e-0", "e-")}


def _scoring(results: Mapping[str, Any]) -> dict[str, str]:
    scoring = results["scoring"]
    agreement = scoring["bf16_agreement"]
    found = {
        "ifd.against_float32": f"{scoring['bf16_against_fp32_loop']:.1f}",
        "ifd.spearman": f"{agreement['spearman']:.4f}",
        "ifd.agreement_rows": str(agreement["rows"]),
        "ifd.common": f"{100 * agreement['top_40_percent_in_common']:.0f} %",
        "ifd.difference": f"{100 * agreement['largest_relative_difference']:.1f} %",
    }
    for line in _lines(scoring):
        if match := re.fullmatch(r"IFD of a quarter of (\d+) rows, SmolLM2-135M, (\w+)", line.what):
            found[f"ifd.{match[2]}.rows_a_second"] = f"{int(match[1]) / 4 / line.ours.median:.1f}"
    return found


def _training(results: Mapping[str, Any]) -> dict[str, str]:
    training = results["training"]
    names = {"pad": "dynamic_pad", "sorted": "dynamic_pad, sorted", "pack": "dynamic_pack"}
    names["checkpointing"] = "dynamic_pack, checkpointing"
    found = {}
    for name, what in names.items():
        mode = _record(training["modes"], what=what)
        found |= {
            f"train.{name}.speed": f"{mode['samples_per_s']:.2f}",
            f"train.{name}.memory": _mebibytes(mode["peak_bytes"]),
            f"train.{name}.padding": f"{100 * mode['padding_share']:.0f} %",
            f"train.{name}.ratio": f"{mode['times_dynamic_pad']:.1f}",
            f"train.{name}.memory_ratio": f"{mode['memory_of_dynamic_pad']:.2f}",
        }
    everything, chosen = (
        next(a for a in training["experiment"] if a["what"].startswith(arm)) for arm in ("(a)", "(b)")
    )
    found |= {"cdas.time": _time(chosen["seconds"]), "cdas.all": _time(everything["seconds"])}
    return {**found, "cdas.ratio": f"{chosen['time_of_a']:.3f}"}


def fill(text: str, known: Mapping[str, str]) -> tuple[str, list[str]]:
    """A page with the figures of ``known``, and a sentence for each that was another or that does not belong there."""
    complaints = []

    def figure(match: re.Match[str]) -> str:
        name, shown = match["name"], match["text"]
        if name not in known:
            complaints.append(f"there is no figure {name}")
        elif shown != known[name]:
            complaints.append(f"{name} is {known[name].strip()[:60]!r}, not {shown.strip()[:60]!r}")
        return f"{match[1]}{known.get(name, shown)}{match[4]}"

    filled, commits = _MARK.sub(figure, text), re.findall(r"\bcommit ([0-9a-f]{7})\b", _MARK.sub("", text))
    complaints += [f"figures of commit {commit} are not from the results" for commit in commits if commit not in APART]
    return filled, complaints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a figure is another")
    check = parser.parse_args().check
    known = figures(newest())
    complaints: list[str] = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after, wrong = fill(before, known)
        complaints += [f"{page.relative_to(ROOT)}: {sentence}" for sentence in wrong]
        if not check and after != before:
            page.write_text(after, encoding="utf-8")
    print("\n".join(complaints) or "every figure in the pages is that of the results")
    if check and complaints:
        sys.exit("write them with: python -m benchmarks.pages")


if __name__ == "__main__":
    main()
