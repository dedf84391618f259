"""The T5 predictor's settings under the class path of older configuration files.

`class_path: predictor.t5.T5Settings` means `predictor.networks.t5.T5Settings`.
"""

from predictor.networks.t5 import T5Settings

__all__ = ["T5Settings"]
