-- Publish the events of one change as one message: '<now ms>' and then each event, see event.
-- events is 'pubsub', or the length of the stream; channels are the 'user:<id>' and 'game:<id>' that it concerns,
-- where one may be named twice. What one channel is told once must be told in one message, so that nobody sees half a
-- change.
local function publish(key_prefix, events, key_lifetime_ms, channels, message)
  local key = key_prefix .. 'events'
  if events ~= 'pubsub' then
    redis.call('XADD', key, 'MAXLEN', '~', events, '*', 'message', message)
    redis.call('PEXPIRE', key, key_lifetime_ms)
    return
  end
  redis.call('SPUBLISH', key, message)
  local is_told = {}
  for index, channel in ipairs(channels) do
    if not is_told[channel] then
      redis.call('SPUBLISH', key .. ':' .. channel, message)
      is_told[channel] = index < #channels or nil -- Most often there is only one, and nothing to remember.
    end
  end
end
