"""Nothing here reaches a network, and two test processes share the cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the Hub's client when it is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
