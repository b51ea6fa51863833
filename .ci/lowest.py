"""Print the lowest versions that pyproject.toml names, one pip constraint a line."""

import re
import tomllib
from pathlib import Path

LOWEST = re.compile(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)")


def main() -> None:
    """Print a constraint for each requirement of the package and its extras."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in dict.fromkeys(named):
        if found := LOWEST.match(requirement):
            print(f"{found[1]}=={found[2]}")


if __name__ == "__main__":
    main()
