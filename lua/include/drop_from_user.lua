-- @include split_sids
-- @include make_sids
-- @include is_recent
-- @include keep_apart
-- Take a connection out of its user's list, and delete the list if it was the only one.
local function drop_from_user(key_prefix, user_id, sid, key_lifetime_ms, now_ms)
  local user_conns_key = key_prefix .. 'user_conns:' .. user_id
  local list = redis.call('GET', user_conns_key)
  local sids, kept_at = split_sids(list)
  for index, other in ipairs(sids) do
    if other == sid then
      table.remove(sids, index)
      break
    end
  end
  if #sids > 0 then
    redis.call('SET', user_conns_key, make_sids(sids, list:sub(kept_at)), 'PX', key_lifetime_ms)
  elseif list then
    if is_recent(list, kept_at, 1000 * now_ms) then
      keep_apart(key_prefix, list:sub(kept_at))
    end
    redis.call('DEL', user_conns_key)
  end
end
