#!lua flags=no-writes
--[[
Read all connections of a user, live or detached, in the order of registration.

KEYS  last_seen, absent (never there, so that a cluster refuses the call while it moves the slot's keys)
ARGV  conn_ttl_ms, user_id
Reply {now ms, sid, record (see split_record) and score (see find_record) of each}
Cost  O(M), M = connections of the user, one by default
]]
-- @include now_ms
-- @include split_sids
-- @include find_users_record

local last_seen_key = KEYS[1]
local conn_ttl_ms, user_id = tonumber(ARGV[1]), ARGV[2]
-- @include key_prefix

local reply = {now_ms}
for _, sid in ipairs(split_sids(redis.call('GET', key_prefix .. 'user_conns:' .. user_id))) do
  local record, score = find_users_record(key_prefix, last_seen_key, user_id, sid, now_ms, conn_ttl_ms)
  if record then
    local count = #reply
    reply[count + 1], reply[count + 2], reply[count + 3] = sid, record, score
  end
end
return reply
