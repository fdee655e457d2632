"""Programs on tests of one's own: verdicts, what cannot be forged, and a reward in TRL's own trainer."""

from __future__ import annotations

from functools import partial

import pytest

import codeact
from codeact.base.errors import InputError
from codeact.evaluation.rewards import last_block
from codeact.evaluation.sandbox.sandbox import Limits

pytestmark = pytest.mark.usefixtures("isolated")

FIRST = "assert smallest([3, 1, 2]) == 1"
MIN = f"import math\n{FIRST}\nassert smallest([math.pi]) == 3.1415926\nassert not smallest([0])\n"
# It reads its own file, in which the tests are.
READER = "def smallest(items):\n    return 1 if '=' '= 1' in open(__file__).read() else 9"
EQUAL = "class E:\n    def __eq__(s, o): return True\nsmallest = lambda items: E()"
BYTES = """import sys
if __name__ == '__main__':
    sys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.read().split())))
    sys.exit()"""
RIGHT = "def smallest(items):\n    return min(items)"
ADD = [("1 2\n", "3\n"), ("10\n-4\n", "6")]


@pytest.mark.parametrize(
    ("code", "kind", "passed", "failed"),
    [
        (RIGHT, "pass", 3, None),
        ("from __future__ import annotations\n" + RIGHT + "\nif True:\n    x = 1", "pass", 3, None),
        ("def smallest(items):\n    return items[-1]", "wrong", 0, FIRST),
        ("def smallest(items):\n    return 1", "wrong", 1, "assert smallest([math.pi]) == 3.1415926"),
        ("def smallest(items):\n    return items.min()", "exception", 0, FIRST),
        ("def smallest(items:", "syntax", 0, FIRST),
        ("def smallest(items):\n    while True: pass", "time", 0, FIRST),
        ("import os\nos._exit(0)", "crash", 0, FIRST),
        # What a test run by the program itself would take for right:
        (EQUAL, "wrong", 0, FIRST),
        (READER, "wrong", 0, FIRST),
        ("raise SystemExit", "exception", 0, FIRST),
    ],
)  # fmt: skip
def test_asserts(code, kind, passed, failed):
    result = codeact.run_program(code, MIN)
    assert (result.kind, result.passed, result.tests, result.failed) == (kind, passed, 3, failed)
    assert result.ok == (kind == "pass")


@pytest.mark.parametrize(
    ("code", "kind", "failed"),
    [
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())), ' ')", "pass", None),
        (BYTES, "pass", None),
        ("print(sum(map(int, input().split())))", "wrong", "10\n-4\n"),
        ("print(int(input()))", "exception", "1 2\n"),
        ("print(", "syntax", "1 2\n"),
        ("while True: pass", "time", "1 2\n"),
        ("'''\n\"\"\"\nprint(3)", "syntax", "1 2\n"),
    ],
)  # fmt: skip
def test_input_and_output(code, kind, failed):
    result = codeact.run_program(code, ADD, limits=Limits(min_seconds=2))
    assert (result.kind, result.failed) == (kind, failed), result


def test_a_batch_keeps_its_order_and_has_tests_of_its_own():
    codes = [f"def f(x):\n    return x + {n}" for n in range(6)]
    same = codeact.run_programs(codes, "assert f(1) == 3", parallel=3)
    assert [result.kind for result in same] == ["wrong", "wrong", "pass", "wrong", "wrong", "wrong"]
    own = codeact.run_programs(codes, [[f"assert f(1) == {n + 1}"] for n in range(6)], own_tests=True)
    assert all(result.ok for result in own)
    with pytest.raises(InputError, match="6 programs and the tests of 1"):
        codeact.run_programs(codes, ["assert f(1) == 1"], own_tests=True)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("", "there is no test"),
        ("assert f(1) ==", "is no Python"),
        ("x = 1", "test 'x = 1' cannot be kept from the program"),
        ("import math\nassert math.isclose(f(1), 2)", "cannot be kept from the program; write assert CALL == LITERAL"),
        ("assert f(1) == f(2)", "cannot be kept"),
        ("assert f(1) < 2", "cannot be kept"),
        (["assert f(1) == 1", ("a", "b")], "are mixed"),
    ],
)
def test_tests_that_are_none(tests, message):
    with pytest.raises(InputError, match=message):
        codeact.run_program("def f(x): return x", tests)


def test_the_last_block_of_an_answer():
    assert last_block("a\n```python\nx = 1\n```\nor\n```\nx = 2\n```\n") == "x = 2\n"
    assert last_block("x = 3") == "x = 3"
    rewards = codeact.pass_share(
        [f"So:\n```python\n{RIGHT}\n```", [{"role": "assistant", "content": "def smallest(x):\n    return 1"}], "no"],
        tests=[MIN] * 3,
        prompts=["p"] * 3,
        limits=Limits(min_seconds=2),
    )
    assert rewards == [1.0, pytest.approx(1 / 3), 0.0]


def test_a_reward_of_trls_grpo_trainer(tiny_model_path, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra dev)")
    from datasets import Dataset

    seen = []

    def reward(completions, tests, **more):
        seen.append((completions, tests))
        return codeact.pass_share(completions, tests, **more)

    rows = [
        {"prompt": f"def f(x): # add {n}\n", "tests": ["assert f(1) == 2", f"assert f(2) == {n}"]} for n in range(4)
    ]
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2, save_strategy="no",
        max_completion_length=6, use_cpu=True, bf16=False, report_to="none", logging_steps=1,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(tiny_model_path),
        reward_funcs=[reward, partial(codeact.pass_share, limits=Limits(min_seconds=2), parallel=2)],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert logged["reward"] == 0.0  # of random tokens
    assert [len(completions) for completions, _ in seen] == [4]
    assert all(tests[0] == "assert f(1) == 2" for tests in seen[0][1])
