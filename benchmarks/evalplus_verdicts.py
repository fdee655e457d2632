"""evalplus' own verdicts, for ``benchmarks.evaluation``; runs in a process whose path holds evalplus.

    python benchmarks/evalplus_verdicts.py humaneval|mbpp SAMPLES.jsonl OUTPUT.json PARALLEL

The data set is the file that evalplus' HUMANEVAL_OVERRIDE_PATH or MBPP_OVERRIDE_PATH names. Ground truth is computed
before the clock starts (and kept, by the file's own hash), and the programs run in a pool of processes, as in
``evalplus.evaluate``.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def main() -> None:
    from evalplus.data import get_human_eval_plus, get_human_eval_plus_hash, get_mbpp_plus, get_mbpp_plus_hash
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.evaluate import check_correctness, get_groundtruth

    dataset, source, target, parallel = sys.argv[1:]
    if dataset == "humaneval":
        problems = get_human_eval_plus()
        truth = get_groundtruth(problems, get_human_eval_plus_hash(), [])
    else:
        problems = get_mbpp_plus()
        truth = get_groundtruth(problems, get_mbpp_plus_hash(), MBPP_OUTPUT_NOT_NONE_TASKS)
    samples = [json.loads(line) for line in Path(source).read_text().splitlines()]
    numbers: Counter[str] = Counter()
    begin = time.perf_counter()
    with ProcessPoolExecutor(int(parallel)) as pool:
        futures = []
        for sample in samples:
            task_id = sample["task_id"]
            arguments = (dataset, numbers[task_id], problems[task_id], sample["solution"], truth[task_id])
            futures.append(pool.submit(check_correctness, *arguments, False, True))
            numbers[task_id] += 1
        results = [future.result() for future in futures]
    seconds = time.perf_counter() - begin
    verdicts = [[result["base"][0], result["plus"][0]] for result in results]
    peak = None
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    Path(target).write_text(json.dumps({"seconds": seconds, "verdicts": verdicts, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
