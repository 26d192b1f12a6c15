"""Functions as users write them, from papers and well-known model code: what mlpdsl must print, refuse or warn of.

Written without a look at the code generator, so that it also holds what that does not cover. There are no tests here.
"""

from tests.functions.activations import FORMULAS, Activation
from tests.functions.epilogues import EPILOGUES
from tests.functions.forms import FORMS
from tests.functions.gated import GATED
from tests.functions.refused import REFUSED
from tests.functions.unstable import UNSTABLE

__all__ = ["ACTIVATIONS", "EPILOGUES", "GATED", "REFUSED", "UNSTABLE"]

ACTIVATIONS: dict[str, Activation] = {**FORMULAS, **FORMS}
