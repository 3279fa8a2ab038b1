"""Check the shapes of public signatures while the tests run (jaxtyping + beartype); compile tests unload it themselves."""

from jaxtyping import install_import_hook

install_import_hook("longspan", "beartype.beartype")
