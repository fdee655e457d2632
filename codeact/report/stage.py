"""Stage report: a run's folder -> one HTML page."""

from __future__ import annotations

from typing import Any

from codeact.base.stage import Lines, Run, Stage


class Report(Stage):
    """In a run."""

    name = section = "report"
    outputs = ("report.html",)
    told = False

    def inputs(self, run: Run) -> dict[str, Any]:
        """What decided everything that it shows."""
        from codeact import __version__

        return {**run.keys(), "codeact": __version__}

    def work(self, run: Run) -> Lines:
        """Write the ledger, and the page about all of it."""
        from codeact.report.page import write_report

        run.ledger().write(run.output / "ledger.json")
        return [("report", str(write_report(run.output)))]
