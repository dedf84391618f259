"""The causal predictor's settings under the class path of older configuration files.

`class_path: predictor.causal.CausalSettings` means `predictor.networks.causal.CausalSettings`.
"""

from predictor.networks.causal import CausalSettings

__all__ = ["CausalSettings"]
