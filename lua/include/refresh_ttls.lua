-- @include split_record
-- @include split_sids
-- @include make_sids
-- @include is_recent
-- Keep every key that a connection lives in from expiring; mend its user's list if that was evicted, and rid the list
-- of an old answer. Gives false if the record was evicted: then nothing of the connection is left but its entry in
-- last_seen, which goes too.
local function refresh_ttls(key_prefix, last_seen_key, sid, key_lifetime_ms, now_ms)
  local conn_key = key_prefix .. 'conn:' .. sid
  local record = redis.call('GET', conn_key)
  if not record then
    redis.call('ZREM', last_seen_key, sid)
    return false
  end
  local game_id, user_id, server = split_record(record)
  redis.call('PEXPIRE', conn_key, key_lifetime_ms)
  redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
  local user_conns_key = key_prefix .. 'user_conns:' .. user_id
  local list = redis.call('GET', user_conns_key)
  local sids, kept_at = split_sids(list)
  local kept, is_listed = list and list:sub(kept_at) or '', false
  for _, listed in ipairs(sids) do
    is_listed = is_listed or listed == sid
  end
  if not is_listed then
    -- The list was evicted, and may have begun anew with another connection, which is then the active one.
    table.insert(sids, 1, sid)
  end
  local is_to_stay = kept == '' or is_recent(list, kept_at, 1000 * now_ms)
  if is_listed and is_to_stay then
    redis.call('PEXPIRE', user_conns_key, key_lifetime_ms)
  else
    -- The old answer takes more memory than the list.
    redis.call('SET', user_conns_key, make_sids(sids, is_to_stay and kept or ''), 'PX', key_lifetime_ms)
  end
  if game_id ~= '' then
    redis.call('PEXPIRE', key_prefix .. 'game_conns:' .. game_id, key_lifetime_ms)
  end
  if server ~= '' then
    redis.call('PEXPIRE', key_prefix .. 'server_conns:' .. server, key_lifetime_ms)
  end
  return true
end
