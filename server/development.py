"""`create`: the application for uvicorn's reloader; scripts/docker-dev.sh starts it.

uvicorn llm_edge.server.development:create --factory --reload
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from llm_edge.server.app import create_app
from llm_edge.server.guard import App
from llm_edge.server.options import LogLevel, ServeOptions


def create() -> App:
    """The application with default options, for this machine only; LLM_SERVE_MODELS names another models folder."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    models = Path(os.environ.get("LLM_SERVE_MODELS", ServeOptions().models))
    return create_app(ServeOptions(models=models, log_level=LogLevel.ACCESS, drain_seconds=1).to_config())
