-- @include split_record
-- Take away the record of a connection of the user: gives the record, its game and its server. Nil when it was evicted,
-- and may be another user's by now.
local function take_record(key_prefix, sid, user_id, key_lifetime_ms)
  local conn_key = key_prefix .. 'conn:' .. sid
  local record = redis.call('GETDEL', conn_key)
  if record then
    local game_id, its_user_id, server = split_record(record)
    if its_user_id == user_id then
      return record, game_id, server
    end
    redis.call('SET', conn_key, record, 'PX', key_lifetime_ms)
  end
  return nil
end
