"""How much memory the two ways over a million tenants need: out by `stream`, in by `car-cp tenant import`.

Run as a program, this module is what is measured: the process ends by printing what it had at the start and at its peak.
"""

import asyncio
import json
import platform
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Bench, Line, Table, at_most, interleaved, last_json

TENANTS = 1_000_000
FEW = 100_000
MIB = 1024 * 1024


async def measure(bench: Bench) -> Table:
    tenants, few = bench.size(TENANTS), bench.size(FEW)
    dsn = await bench.filled(tenants)

    async def stream() -> float:
        used = last_json("-m", "benchmarks.memory", "stream", dsn)
        assert used["rows"] == tenants + 1  # and system_admin
        return float(used["peak"] - used["start"])

    async def peak_of_import(count: int) -> float:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "tenants.csv")
            write(file, count)
            async with bench.fresh() as own:
                used = last_json("-m", "benchmarks.memory", "import", str(file), environment={"DATABASE_URL": own})
        assert used["exit"] == 0
        return float(used["peak"])

    async def import_() -> float:
        return await peak_of_import(tenants) - await peak_of_import(few)

    costs = await interleaved({"stream": stream, "import": import_}, min(bench.rounds, 3))
    return Table(
        "Memory",
        "Resident memory above the other, each in a process of its own.",
        [
            Line(
                f"`stream` of {tenants:,}, peak",
                "before",
                [cost / MIB for cost in costs["stream"]],
                at_most(30),
                " MiB",
            ),
            Line(
                f"`car-cp tenant import` of {tenants:,} lines, peak",
                f"that of {few:,}",
                [cost / MIB for cost in costs["import"]],
                at_most(15),
                " MiB",
            ),
        ],
    )


def write(file: Path, count: int) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.write("name,environment,label.plan\n")
        lines.writelines(f"tenant-{number},production,basic\n" for number in range(count))


def memory(field: str) -> int:
    """Return a figure of this process, in bytes: VmRSS is what it has, VmHWM what it had at most."""
    if sys.platform == "linux":  # getrusage would count what the process was before it became this program
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition(f"{field}:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


async def stream(dsn: str) -> dict[str, int]:
    from car_control_plane import AsyncConnectionManager, TenantRepository

    rows = 0
    async with AsyncConnectionManager(dsn) as manager, manager.get_read_session() as session:
        await session.connection()
        start = memory("VmRSS")
        async for _ in TenantRepository(session).stream():
            rows += 1
    return {"rows": rows, "start": start, "peak": memory("VmHWM")}


def import_(file: str) -> dict[str, int]:
    from car_control_plane.cli import main

    sys.argv = ["car-cp", "tenant", "import", file]
    return {"exit": main(), "peak": memory("VmHWM")}


if __name__ == "__main__":
    what, argument = sys.argv[1:]
    print(json.dumps(asyncio.run(stream(argument)) if what == "stream" else import_(argument)))
