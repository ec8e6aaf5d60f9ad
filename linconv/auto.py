"""Converted models among transformers' Auto classes, with ``import linconv.auto``.

Every converted checkpoint carries a copy of this file, by which ``trust_remote_code=True`` finds its classes in the
installed linconv package.
"""

from linconv.conversion import models
from linconv.conversion.families import FAMILIES

for _family in FAMILIES.values():
    globals().update(models.converted_classes(_family))
    globals()[models.converted_config_class(_family).__name__] = models.converted_config_class(_family)
