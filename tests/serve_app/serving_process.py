"""The service without Ray, for tests that kill it: prints its port when it listens.

python -m tests.serve_app.serving_process <registry> <folder>
"""

import socket
import sys
from pathlib import Path

import uvicorn

from recsys.artifact import load_artifact
from serve_app.api import create_app
from serve_app.errors import RankerUnavailableError
from serve_app.intake import open_intake
from serve_app.recommender import Model, Recommender
from serve_app.settings import Settings


class NoRanker:
    """Events need none."""

    async def rank(self, query):
        raise RankerUnavailableError("there is none")

    similar = rank

    async def describe(self):
        raise RankerUnavailableError("there is none")


def main(registry: Path, folder: Path) -> None:
    settings = Settings(
        registry=registry,
        history_path=folder / "events.sqlite",
        events_landing=str(folder / "landing"),
        ship_every_s=0.05,
        ship_rows=50,
    )
    intake = open_intake(settings)
    model = Model.of(load_artifact(registry / "v1"))
    recommender = Recommender(model, intake.history, NoRanker(), settings)
    app = create_app(recommender, intake, settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
