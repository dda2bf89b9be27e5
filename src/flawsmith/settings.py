"""The names of `flawsmith.config` at their former place."""

from flawsmith.config import (
    SECTIONS,
    ComputeSettings,
    Settings,
    TrackingSettings,
    load_content,
    load_settings,
    parse_settings,
    problems,
    read_yaml,
)
from flawsmith.data.config import DataSettings
from flawsmith.demo.config import DemoDataSettings
from flawsmith.detector.config import DistillSettings, TeacherSettings
from flawsmith.diffusion.config import DdpmTrainSettings
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.export.config import ExportSettings
from flawsmith.monitoring.config import MonitorSettings
from flawsmith.quality.config import ValidateSettings
from flawsmith.registry.config import PromoteSettings
from flawsmith.sections import deciding_values, parse_section, section_values, settings_digest
from flawsmith.synthesis.config import SynthesizeSettings

__all__ = [
    "SECTIONS",
    "ComputeSettings",
    "DataSettings",
    "DdpmTrainSettings",
    "DemoDataSettings",
    "DistillSettings",
    "EvaluateSettings",
    "ExportSettings",
    "MonitorSettings",
    "PromoteSettings",
    "Settings",
    "SynthesizeSettings",
    "TeacherSettings",
    "TrackingSettings",
    "ValidateSettings",
    "deciding_values",
    "load_content",
    "load_settings",
    "parse_section",
    "parse_settings",
    "problems",
    "read_yaml",
    "section_values",
    "settings_digest",
]
