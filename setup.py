"""The quickstart's data lie in data/ of a clone; a wheel brings them inside the package, for `dpo-score quickstart`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DATA = Path(__file__).parent / "data"


class BuildWithQuickstart(build_py):
    """Copies the pairs and the adapters to dpo_score/quickstart/ of what is built; an editable install reads data/."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "dpo_score/quickstart"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / "quickstart-test.parquet", target)
        shutil.copytree(DATA / "quickstart-adapters", target / "quickstart-adapters", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithQuickstart})
