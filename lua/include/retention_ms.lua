-- How much longer than its connections a key lives: a day, for cleanup to find and report a dead record, and three
-- hours, since the last heartbeats may not have refreshed its TTL (see refresh_interval_ms): that those of three hours
-- all do not is less likely than e^-12.
local retention_ms = 97200000
