"""Detection and settings of machines with one pool of memory, re-exported from pixtune.hardware.unified."""

from pixtune.hardware.unified import get_memory_config, is_unified_memory_system, setup_unified_memory_env

__all__ = ["get_memory_config", "is_unified_memory_system", "setup_unified_memory_env"]
