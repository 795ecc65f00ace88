"""What the documents about registers show, made by the code that the daemon runs; see tests/test_registers_doc.py."""

import sys

from tests import thirdparty

# The example is not installed; it is looked at here, not found as a plugin.
sys.path += [str(project) for project in thirdparty.projects() if str(project) not in sys.path]
