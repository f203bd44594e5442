"""rfloor's main job: measure the cells that the command line names.

python runner.py                                   one cell: the defaults of conf/config.yaml
python runner.py -m quant=none,nf4 context=512,2048  a sweep
python runner.py --help                            groups, options and keys
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import hydra

from registry.sweep import job, prepare

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> Any:
    """Hydra's entry; the sweep's callback runs the cells."""
    return job(config)


if __name__ == "__main__":
    try:
        sys.argv[1:] = prepare(sys.argv[1:])
        main()
    except KeyboardInterrupt:  # later the sweep itself is told
        sys.exit("rfloor: interrupted before anything was measured")
