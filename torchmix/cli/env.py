"""``torchmix env``: versions, processor, and which kernels are live or why not."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

from torchmix.cli import options as flags
from torchmix.cli.formatting import facts
from torchmix.cli.json_report import STDOUT, check_json_target, write_json_report
from torchmix.cli.startup import package_version, start, torchmix_version

DESCRIPTION = """\
Print what torchmix finds on this machine: versions, processor features, GPUs, and for CPU and CUDA whether compiled
kernels are live and, if not, why. Put this into a bug report.
"""
EXAMPLES = """\
  torchmix env
  torchmix env --json -
"""
PACKAGES = ("torch", "torchao", "transformers", "safetensors", "datasets", "numpy")
CPU_FEATURES = ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "asimddp", "i8mm")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add this command to the parser of all commands."""
    parser = flags.command_parser(
        commands, "env", "versions, processor, and which kernels are live", DESCRIPTION, EXAMPLES
    )
    flags.add_output(parser, progress=False)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the environment."""
    check_json_target(options.json)
    start()
    report = environment()
    if options.json != STDOUT:
        print(_text(report))
    write_json_report(options.json, report)
    return 0


def environment() -> dict[str, Any]:
    """Everything this command reports, by name."""
    import torch

    from torchmix._extension import cpu_capability, kernel_status

    status = kernel_status()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kernels = {device: status.reason(device) for device in ("cpu", "cuda")}
    return {
        "torchmix": torchmix_version(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: package_version(name) for name in PACKAGES},
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "features": cpu_features(),
        },
        "gpus": gpus,
        "kernels": {device: {"live": reason is None, "reason": reason} for device, reason in kernels.items()},
        "cpu_capability": cpu_capability(),
        "kernel_files": [str(library.path) for library in status.libraries],
    }


def cpu_features() -> list[str]:
    """Instruction sets for integer products that the processor reports (Linux), best first."""
    found = set(_cpu_info("flags").split()) | set(_cpu_info("Features").split())
    return [name for name in CPU_FEATURES if name in found]


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or "unknown"


def _cpu_info(key: str) -> str:
    """A value of /proc/cpuinfo, "" where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        return ""
    return ""


def _text(report: dict[str, Any]) -> str:
    """What is printed."""
    cpu = report["cpu"]
    pairs = [(name, report[name] or "not installed") for name in ("torchmix", "python", *PACKAGES)]
    features = ", ".join(cpu["features"]) or "none known"
    pairs += [
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']} threads"),
        ("cpu features", f"{features} (torch: {cpu['torch_capability']})"),
        ("gpu", ", ".join(report["gpus"]) or "none that torch can use"),
    ]
    for device, kernel in report["kernels"].items():
        live = f"live{_capability(report) if device == 'cpu' else ''}"
        pairs.append((f"{device} kernels", live if kernel["live"] else f"not live: {kernel['reason']}"))
    return facts([(name, str(value)) for name, value in pairs])


def _capability(report: dict[str, Any]) -> str:
    """Which instructions the CPU kernels use, as it is printed."""
    if report["cpu_capability"] is not None:
        return f", {report['cpu_capability']}"
    wanted = os.environ.get("TORCHMIX_CPU_CAPABILITY", "")
    return f", but TORCHMIX_CPU_CAPABILITY={wanted} names nothing that can run here"
