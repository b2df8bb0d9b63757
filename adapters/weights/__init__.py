"""Weight adapters: a frozen network with a trained weight map on each hidden layer.

Each file holds one: the map's settings (a frozen dataclass for `adapters.reparam.attach`), and the
method that makes it a learner.
"""

from adapters.weights.adalora import AdaLoRA
from adapters.weights.allora import ALLoRA
from adapters.weights.eva import EVA
from adapters.weights.hut import HUT
from adapters.weights.lora import LoRA
from adapters.weights.lora_sb import LoRASB
from adapters.weights.miss import MiSS
from adapters.weights.sorsa import SORSA
from adapters.weights.svfit import SVFit

__all__ = ["EVA", "HUT", "SORSA", "ALLoRA", "AdaLoRA", "LoRA", "LoRASB", "MiSS", "SVFit"]
