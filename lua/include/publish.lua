-- Publish the events of one change as one message: '<now ms>' and then each event, see event.
-- events is 'pubsub', or the length of the stream; channels are the 'user:<id>' and 'game:<id>' that it concerns. Each
-- gets all events of the change together, so that nobody sees half of it, and only once, even if it is named twice.
local function publish(key_prefix, events, key_lifetime_ms, channels, message)
  local key = key_prefix .. 'events'
  if events ~= 'pubsub' then
    redis.call('XADD', key, 'MAXLEN', '~', events, '*', 'message', message)
    redis.call('PEXPIRE', key, key_lifetime_ms)
    return
  end
  redis.call('SPUBLISH', key, message)
  for index, channel in ipairs(channels) do
    local is_told = false
    for earlier = 1, index - 1 do
      is_told = is_told or channels[earlier] == channel
    end
    if not is_told then
      redis.call('SPUBLISH', key .. ':' .. channel, message)
    end
  end
end
