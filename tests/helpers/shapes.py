"""Check the shapes of public signatures while the tests run (jaxtyping and beartype); import this before longspan."""

from jaxtyping import install_import_hook

install_import_hook("longspan", "beartype.beartype")
