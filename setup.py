"""Lists the packages: every top-level folder with a `py.typed` is imported as `llm_edge.<folder>`."""

from pathlib import Path

from setuptools import find_packages, setup

folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/py.typed"))
setup(
    packages=[
        f"llm_edge.{name}"
        for folder in folders
        for name in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))
    ],
    package_dir={f"llm_edge.{folder}": folder for folder in folders},
)
