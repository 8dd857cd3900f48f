"""Where tests and doctests run: on eight virtual CPU devices, or on `CKPT_JAX_TEST_PLATFORM`.

On another platform than "cpu" only tests with the marker `device` can run.

At the root rather than in tests/, so that it holds for the doctests of the package too. The
variables are read when JAX first looks for devices, which is after this file was imported, and
are inherited by the processes that tests start.
"""

import os
import signal

# Jobs in the background of a shell ignore Ctrl-C, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = os.environ.get("CKPT_JAX_TEST_PLATFORM", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

# Without these TensorStore would look for the metadata servers of clouds, beyond this machine.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "x"

pytest_plugins = ["store_fixtures"]

collect_ignore_glob = [
    "ckpt_jax/graph/_proto/*",  # generated, without doctests
    "tests/foreign/*",  # what made the files there needs the libraries that they belong to
]
