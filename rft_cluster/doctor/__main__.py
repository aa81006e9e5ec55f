"""Check this machine, or a run:

    python -m rft_cluster.doctor                    what a run needs: packages, GPU, memory, disk, network, Ray
    python -m rft_cluster.doctor --config photos data.path=photos        and this run's model, data and cluster
    python -m rft_cluster.doctor --run RUN_DIR      a run that is done, stopped or in progress: its files prove that
                                                    nothing was lost and nothing was done twice

Writes nothing. Exit code 0: all is well; 1: something is wrong, and said with what to do.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rft_cluster.common.errors import end_with, exit_code
from rft_cluster.doctor.finding import Finding, error
from rft_cluster.doctor.packages import Imports, check_versions, device_of_environment

if TYPE_CHECKING:
    from rft_cluster.config import Config

PACKAGES = ("torch", "torchvision", "transformers", "vllm")
DRY_RUN = "python -m rft_cluster.launch --config NAME --dry-run checks the rest: question, rewards, memory"


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 all is well, 1 something is wrong, 2 a mistake of the user's. Defects keep their traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m rft_cluster.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="the folder of a run; nothing else is checked")
    parser.add_argument("--config", help="a YAML file, or the bare name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the config")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(arguments)
    if options.run:
        if options.config or options.json:
            parser.error("--run takes neither --config nor --json")
        from rft_cluster.doctor.proof import prove

        return exit_code(lambda: prove(options.run))
    if options.overrides and not options.config:
        parser.error(f"{options.overrides[0]} changes a value of a configuration: name it with --config")
    return exit_code(lambda: check_machine(options.config, options.overrides, options.json))


def check_machine(name: str | None, overrides: list[str], as_json: bool) -> int:
    """Print what is found, each finding as soon as it is known. Returns 1 if one of them is an error."""
    found = []
    for finding in findings(name, overrides):
        found.append(finding)
        if not as_json:
            print(line_of(finding), flush=True)
    errors, warnings = (sum(one.status == status for one in found) for status in ("error", "warning"))
    if as_json:
        print(json.dumps({"findings": list(map(asdict, found)), "errors": errors, "warnings": warnings}, indent=2))
    else:
        print(f"\n{_summary(errors, warnings)}")
    return 1 if errors else 0


def findings(name: str | None, overrides: list[str]) -> Iterator[Finding]:
    """All findings. Those about packages come first: others need the packages."""
    try:
        config = _config(name, overrides) if name else None
        device = config.cluster.device if config else device_of_environment()
    except ImportError:
        config, device = None, device_of_environment()
    with closing(Imports(device, PACKAGES)) as imports:
        yield from check_versions(device)
        try:
            from rft_cluster.doctor.machine import check_this_machine
        except ImportError as missing:
            yield error("machine", f"not checked, because a package is missing: {missing}")
        else:
            yield from check_this_machine(device, config)
        yield from imports.findings()


def _config(name: str, overrides: list[str]) -> "Config":
    from rft_cluster.config import load_config

    return load_config(name, overrides)


def line_of(finding: Finding) -> str:
    first, *others = finding.text.splitlines() or [""]
    return "\n".join([f"{finding.name:<20}{finding.status:<9}{first}", *(f"{'':<29}{line}" for line in others)])


def _summary(errors: int, warnings: int) -> str:
    counted = [f"{n} {word}{'s' * (n > 1)}" for n, word in ((errors, "error"), (warnings, "warning")) if n]
    if errors:
        return f"{' and '.join(counted)}: a run cannot start before the errors are cured"
    return f"{' and '.join(counted) or 'all is well'}: a run can start. {DRY_RUN}"


if __name__ == "__main__":
    end_with(main)
