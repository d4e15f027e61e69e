-- How much longer than its connections a key lives: a day, for cleanup to find and report a dead record, of which the
-- heartbeats' refreshes use up about 15 minutes.
local retention_ms = 86400000
