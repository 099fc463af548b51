"""What correct means for an attention kernel, and the suite that holds one to it.

`suite.validate` runs groups of checks over a `Subject`; `suite.self_test` runs the same groups over planted faults.
"""
