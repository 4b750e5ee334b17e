"""`ghostserve drill`: break a real cluster in mid-stream, and see that every stream ends with the same text."""

from services.cli.drill.options import Options, add_arguments, parse_options
from services.cli.drill.report import Report
from services.cli.drill.run import closed_record, drill, run_drill
from services.cli.drill.streams import Stream, stream_all

__all__ = [
    "Options",
    "Report",
    "Stream",
    "add_arguments",
    "closed_record",
    "drill",
    "parse_options",
    "run_drill",
    "stream_all",
]
