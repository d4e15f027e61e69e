#!lua flags=no-writes
--[[
Read one connection, live or detached.

KEYS  conn, last_seen
ARGV  conn_ttl_ms
Reply {now ms, record (see split_record), score (see find_record)}, or {} when there is no such connection, live or
      within its grace
Cost  O(1)
]]
-- @include now_ms
-- @include find_record

local conn_key, last_seen_key = KEYS[1], KEYS[2]
local conn_ttl_ms = tonumber(ARGV[1])
-- @include sid

local record, score = find_record(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms)
return record and {now_ms, record, score} or {}
