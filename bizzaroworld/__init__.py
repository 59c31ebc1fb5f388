"""Where does a language model keep its facts? Exact activation patching, end to end.

`import bizzaroworld as bw` gives what a user needs; each name is loaded when it is first used, so that the import costs nothing.
The names are listed in `__init__.pyi`, which type checkers read as well."""
import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
