-- @include is_recent
-- Keep the answer that is with a user's list under its own key: the list goes, or is to hold another answer.
local function keep_apart(key_prefix, kept, now)
  if is_recent(kept, now) then
    redis.call('SET', key_prefix .. 'reply:' .. string.sub(kept, 1, 16), string.sub(kept, 17), 'PX', '60000')
  end
end
