"""Small quantised checkpoints in the tensor layouts of real ones.

write_quantised(source, target, "fp8-block") codes the experts (and the dense projections where real
checkpoints do) of a small unquantised directory. Rounding is to the nearest number, no more.

layouts     all layouts, by name
checkpoint  the writing of a directory
reference   numbers from codes, one by one by their definition
"""

from tests.helpers.quantised.checkpoint import LayoutWriter, save_source, write_quantised
from tests.helpers.quantised.layouts import LAYOUTS, layouts_of

__all__ = ["LAYOUTS", "LayoutWriter", "layouts_of", "save_source", "write_quantised"]
