#!lua flags=no-writes
--[[
Read the active connection of each of several users: of the live ones, the one that registered last.

KEYS  last_seen, absent (never there, so that a cluster refuses the call while it moves the slot's keys)
ARGV  conn_ttl_ms, user_ids (at most 100)
Reply {now ms, sid, record (see split_record) and score (see find_record) of each user's, or '', '' and '' when the user
      has no live connection}
Cost  O(M) for each user, M = connections of the user, one by default
]]
-- @include now_ms
-- @include split_sids
-- @include find_users_record

local last_seen_key = KEYS[1]
local conn_ttl_ms = tonumber(ARGV[1])
local user_ids = {unpack(ARGV, 2)}
-- @include key_prefix

local function active(user_id)
  local sids = split_sids(redis.call('GET', key_prefix .. 'user_conns:' .. user_id))
  for index = #sids, 1, -1 do
    local sid = sids[index]
    local record, score, is_detached =
      find_users_record(key_prefix, last_seen_key, user_id, sid, now_ms, conn_ttl_ms)
    if record and not is_detached then
      return sid, record, score
    end
  end
  return '', '', ''
end

local reply = {now_ms}
for _, user_id in ipairs(user_ids) do
  local count = #reply
  reply[count + 1], reply[count + 2], reply[count + 3] = active(user_id)
end
return reply
