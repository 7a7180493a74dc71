"""What the hot paths cost in instructions: counted, and compared with `baseline.json` (``make instructions``).

A count has no timing noise: a regression of a few percent shows on a busy machine as it does on a quiet one.
"""
