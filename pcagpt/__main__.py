"""The command `pcagpt`, and `python -m pcagpt`: the same as `python -m pcagpt.main`."""

import runpy


def run() -> None:
    """Runs `pcagpt.main` as a program; ends the process."""
    runpy.run_module("pcagpt.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run()
