"""Device memory in use, re-exported from pixtune.hardware.monitor."""

from pixtune.hardware.monitor import get_memory_stats, log_memory_usage, reset_peak_memory_stats

__all__ = ["get_memory_stats", "log_memory_usage", "reset_peak_memory_stats"]
