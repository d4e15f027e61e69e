-- Put an event after what a message holds so far: ' <kind> <length of the sid> <length of the record> <score> ' and the
-- sid and the record of the connection as it is now or, of one that is gone or has left, as it was. The last event of a
-- message may leave the record's length out: then the rest is the record.
local function event(message, kind, sid, record, score)
  return message .. ' ' .. kind .. ' ' .. #sid .. ' ' .. #record .. ' ' .. score .. ' ' .. sid .. record
end
