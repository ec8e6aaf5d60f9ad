"""``import linconv.auto`` registers converted models with transformers' Auto classes.

Every converted checkpoint contains a copy of this file, through which ``trust_remote_code=True`` finds the classes in
the installed linconv package.
"""

from linconv.conversion import models
from linconv.conversion.families import FAMILIES

for _family in FAMILIES.values():
    globals().update(models.converted_classes(_family))
    globals()[models.converted_config_class(_family).__name__] = models.converted_config_class(_family)
