"""What importing costs: CPU seconds of the import statement, in interpreters of their own."""

from benchmarks.harness import Bench, Line, Table, Way, at_most, interleaved, last_json, ratios

_PROGRAM = "import time; before = time.process_time(); import {modules}; print(time.process_time() - before)"

MODULES = {
    "package": "car_control_plane",
    "models": "car_control_plane.models",
    "everything": "car_control_plane.models, car_control_plane.repositories, car_control_plane.connection",
    "sqlmodel": "sqlmodel",
    "sqlmodel and asyncpg": "sqlmodel, asyncpg",
    "what everything needs": "sqlmodel, sqlmodel.ext.asyncio.session, asyncpg, pydantic_settings",
}


async def measure(bench: Bench) -> Table:
    def way(modules: str) -> Way:
        async def run() -> float:
            return float(last_json("-c", _PROGRAM.format(modules=modules)))

        return run

    ways = {name: way(modules) for name, modules in MODULES.items()}
    await interleaved(ways, 1)  # writes the bytecode
    costs = await interleaved(ways, bench.rounds)
    return Table(
        "Imports",
        "CPU time of the statement in a fresh interpreter, bytecode in place.",
        [
            Line(
                "`import car_control_plane`",
                "`import sqlmodel`",
                ratios(costs, "package", to="sqlmodel"),
                at_most(0.15),
            ),
            Line(
                "... and its models",
                "`import sqlmodel, asyncpg`",
                ratios(costs, "models", to="sqlmodel and asyncpg"),
                at_most(1.1),
            ),
            Line(
                "... and repositories and manager",
                "the packages they need",
                ratios(costs, "everything", to="what everything needs"),
            ),
        ],
    )
