-- How much longer than its connections a key lives: a day, for cleanup to find and report a dead record, and three
-- hours, because the last heartbeats may not have refreshed its TTL (see refresh_interval_ms); the chance that all
-- those of three hours miss is less than e^-12.
local retention_ms = 97200000
