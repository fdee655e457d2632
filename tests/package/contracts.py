"""A contract for import-linter: modules that import the standard library and nothing else."""

from __future__ import annotations

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class StandardLibraryContract(Contract):
    """``modules`` import nothing that a bare Python has not, nor one another."""

    modules = fields.ListField(subfield=fields.ModuleField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Find the imports of anything else; a module that is gone breaks the contract too."""
        foreign = [
            f"{module.name} -> {imported}"
            for module in self.modules
            for imported in sorted(graph.find_modules_directly_imported_by(module.name))
            if imported.partition(".")[0] not in sys.stdlib_module_names
        ]
        return ContractCheck(kept=not foreign, metadata={"foreign": foreign})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one import a line."""
        for line in check.metadata["foreign"]:
            output.print_error(line)
