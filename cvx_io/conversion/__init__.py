"""Converting weights between formats: `prepare` a job, look at its report, `run` it.

from cvx_io.conversion import Request, prepare
job = prepare(Request(Path("CogVideoX-2b-sat/transformer"), Path("out"), to="hf"))
print(job.report.text())
job.run()
"""

from cvx_io.conversion.job import Job, prepare
from cvx_io.conversion.report import Report
from cvx_io.conversion.request import Request

__all__ = ["Job", "Report", "Request", "prepare"]
