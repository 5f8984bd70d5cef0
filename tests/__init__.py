"""The environment of all tests, set before anything is imported."""

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # else threads that wait keep the cores from others
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and tables would be narrow
