-- @include find_record
-- @include split_record
-- Find the record of one of a user's connections, as find_record does. If records are evicted, the user's list may
-- still hold a sid that is another user's by now: that one counts as unknown, too.
local function find_users_record(key_prefix, last_seen_key, user_id, sid, now_ms, conn_ttl_ms)
  local record, score, is_detached = find_record(key_prefix .. 'conn:' .. sid, last_seen_key, sid, now_ms, conn_ttl_ms)
  if record then
    local _, its_user_id = split_record(record)
    return its_user_id == user_id and record, score, is_detached
  end
end
