"""Without a GPU, Triton's interpreter runs the kernel on the CPU."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
